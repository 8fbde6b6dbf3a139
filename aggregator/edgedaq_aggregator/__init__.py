"""The aggregator: the intake, the journal and the stores of the control room."""
