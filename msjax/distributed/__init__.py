"""One run in many programs: who takes part, and what they tell each other. Nothing here computes."""
