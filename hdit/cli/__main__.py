"""python -m hdit.cli"""

from hdit.cli import main

if __name__ == "__main__":
    main()
