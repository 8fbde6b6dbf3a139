"""The edge agent: supervised jobs beside the hardware, and the uplink to the control room."""
