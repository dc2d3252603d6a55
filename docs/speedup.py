"""Draws README's picture from a result file of `udlkernels bench`: the steps, forward and backward.

    udlkernels bench --full --out benchmarks/results
    python docs/speedup.py benchmarks/results/bench.json

writes docs/pages/images/speedup.png.
"""

import sys
from pathlib import Path

from udlkernels.benchmarks import chart, results

PICTURE = Path(__file__).parent / "pages" / "images" / "speedup.png"


def main() -> None:
    rows = [row for row in results.read_rows(Path(sys.argv[1])) if row.phase == "step"]
    if not chart.draw(rows, PICTURE):
        sys.exit("nothing to draw: no step that counts, or no matplotlib")
    print(PICTURE)


if __name__ == "__main__":
    main()
