"""What the studio works on: runs, jobs, and the model in memory."""
