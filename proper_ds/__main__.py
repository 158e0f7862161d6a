"""Lets `python -m proper_ds` do what the console command `proper-ds` does."""

from proper_ds.cli import main

if __name__ == "__main__":
    main()
