"""What models learn from: simulated acquisitions, and the trainings themselves."""
