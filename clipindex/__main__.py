"""`python -m clipindex`."""

from clipindex.cli import main

if __name__ == "__main__":
    main()
