"""Effects: reading the machine and acting on it. No decisions are taken here."""
