"""What makes a cut model good again: closed-form repair, statistics, a ridge head, and a few iterations."""
