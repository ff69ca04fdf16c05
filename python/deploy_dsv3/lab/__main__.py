"""``python -m deploy_dsv3.lab`` is ``deploy-dsv3 lab``."""

import sys

from ..errors import DeployError
from .commands import lab

if __name__ == "__main__":
    try:
        lab(prog_name="deploy-dsv3 lab")
    except DeployError as error:
        print(f"{error.message}\n{error.remedy}".rstrip(), file=sys.stderr)
        sys.exit(error.exit_code)
