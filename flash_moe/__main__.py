"""``python -m flash_moe``."""

from flash_moe.cli import main

if __name__ == "__main__":
    main()
