"""Checks of the machine and the installation, which `ddiff doctor` prints."""
