"""The command `probe`, and python -m probe: ready for Ctrl-C before anything slow is imported."""

from probe import stopping


def main() -> None:
    stopping.begin()
    from probe.cli import main

    main()


if __name__ == "__main__":
    main()
