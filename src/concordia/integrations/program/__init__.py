"""Programs that know nothing of us, started by `concordia run`, floor 7."""
