"""`python -m benchmarks [NAME ...] [--quick]`: runs them and writes results/benchmarks/<name>.csv."""

from __future__ import annotations

import argparse
import json

import pandas as pd

from benchmarks import (
    bench_cka,
    bench_connectivity,
    bench_corruptions,
    bench_dynamic,
    bench_reproduce,
    bench_snacs,
    bench_structured,
    bench_sweep,
    bench_trainer,
    bench_zoo,
)
from gcnet import paths
from gcnet.errors import unknown
from gcnet.store import atomic_write, provenance

BENCHMARKS = {
    "cka": bench_cka.run,
    "connectivity": bench_connectivity.run,
    "trainer": bench_trainer.run,
    "corruptions": bench_corruptions.run,
    "snacs": bench_snacs.run,
    "dynamic": bench_dynamic.run,
    "structured": bench_structured.run,
    "zoo": bench_zoo.run,
    "sweep": bench_sweep.run,
    "reproduce": bench_reproduce.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which (default all): {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, nothing written")
    options = parser.parse_args()
    for name in options.names or BENCHMARKS:
        if name not in BENCHMARKS:
            raise SystemExit(str(unknown("benchmark", name, BENCHMARKS)))
        rows = pd.DataFrame(BENCHMARKS[name](options.quick))
        print(f"\n{name}\n{rows.to_string(index=False)}", flush=True)
        if not options.quick:
            folder = paths.results("benchmarks")
            with atomic_write(folder / f"{name}.csv") as temporary:
                rows.to_csv(temporary, index=False, float_format="%.5g")
            with atomic_write(folder / f"{name}.json") as temporary:
                temporary.write_text(json.dumps(provenance(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
