"""Many runs, ranked: search spaces, the tuner and the leaderboard."""
