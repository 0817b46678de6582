"""One negative test for each way to cheat whoever verifies a release."""
