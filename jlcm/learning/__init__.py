"""Learning on calibration data: layer by layer, then end to end."""
