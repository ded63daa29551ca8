"""The critic trainer behind the `lambda-critic` command; installed with the extra `[critic]`."""
