"""Draws README's picture from a result file of `udlkernels bench`.

    udlkernels bench --full --out benchmarks/results
    python docs/speedup.py benchmarks/results/bench.json

writes docs/pages/images/speedup.png.
"""

import sys
from pathlib import Path

from udlkernels.benchmarks import chart, results

PICTURE = Path(__file__).parent / "pages" / "images" / "speedup.png"


def main() -> None:
    if not chart.draw(results.read_rows(Path(sys.argv[1])), PICTURE):
        sys.exit("nothing to draw: no row that counts, or no matplotlib")
    print(PICTURE)


if __name__ == "__main__":
    main()
