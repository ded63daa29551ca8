"""Does the lambda-return critic generalise better? `make experiment`; protocol.md says how it is asked."""
