"""What should change: schedules, candidates, growth, the trial that tests them. No model is changed here."""
