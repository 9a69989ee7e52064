"""`python -m kpsvd_tune` does what `kpsvd-tune` does."""

from kpsvd_tune.cli import main

if __name__ == "__main__":
    main()
