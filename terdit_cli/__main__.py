"""`python -m terdit_cli` is `terdit`."""

from terdit_cli.cli.app import main

if __name__ == "__main__":
    main()
