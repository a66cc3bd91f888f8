"""Several studies at once, or all of them: what is missing of their runs, then the report.

python -m experiments.run --scale smoke                                    # all, on the embedded data
python -m experiments.run convergence traffic --scale lite --data-dir DIR
python -m experiments.run --scale paper --data-dir DIR                     # days on a GPU
"""

import sys

from experiments import driver, report

if __name__ == "__main__":
    sys.exit(driver.main(*report.STUDIES, description=__doc__))
