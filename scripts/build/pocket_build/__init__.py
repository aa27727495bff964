"""How the pocket models were made: one file a stage (see stages.py), and what the stages share."""
