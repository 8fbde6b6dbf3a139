"""What both sides share; the jobs of users import from here."""
