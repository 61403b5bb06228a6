"""Verifiers: response text and gold answer in, a verdict out; whatever hangs or crashes is killed and abstains."""
