"""The mathematics, in plain torch: the 4-bit format, the dropout specification, adapter initialisation, the oracle."""
