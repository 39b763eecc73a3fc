"""Everything that turns the library into records: configuration, models, data, runs."""
