"""`python -m fedmllm` is the command `fedmllm`."""

from fedmllm.cli import main

if __name__ == "__main__":
    main()
