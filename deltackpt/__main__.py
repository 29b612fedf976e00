"""``python -m deltackpt`` is the command."""

from deltackpt.cli import main

if __name__ == "__main__":
    main()
