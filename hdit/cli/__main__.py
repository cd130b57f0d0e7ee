"""python -m hdit.cli"""

from hdit.cli.app import main

if __name__ == "__main__":
    main()
