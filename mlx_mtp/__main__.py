"""``python -m mlx_mtp`` is ``mlx-mtp``."""

from mlx_mtp.cli.main import main

if __name__ == "__main__":
    main()
