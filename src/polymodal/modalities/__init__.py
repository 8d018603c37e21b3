"""Files to arrays and back; nothing is learned here."""
