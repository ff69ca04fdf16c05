"""``python -m deploy_dsv3`` is the ``deploy-dsv3`` command."""

from deploy_dsv3.cli import main

if __name__ == "__main__":
    main()
