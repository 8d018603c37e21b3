"""What everything else is built on: samples, tokens, batches, verbs, errors. No learned layers."""
