"""Settings of all tests."""

import signal

from hypothesis import settings

settings.register_profile("no clock", deadline=None)  # a busy machine is no failure
settings.load_profile("no clock")

# A shell that starts the tests in the background has them, and every process that they start,
# ignore Ctrl-C, which some tests press.
signal.signal(signal.SIGINT, signal.default_int_handler)
