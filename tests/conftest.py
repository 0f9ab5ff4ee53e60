"""Hypothesis profiles: ``LAMELLA_HYPOTHESIS_PROFILE=dev|ci|nightly``. Tests set no counts of their own."""

import os

from hypothesis import settings

# Deadlines are off: the machines that run this are shared, and a slow example is not a wrong one.
settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=60, deadline=None, print_blob=True)
settings.register_profile("nightly", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("LAMELLA_HYPOTHESIS_PROFILE", "dev"))
