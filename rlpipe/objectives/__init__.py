"""What is optimised: row planner, ratio unit, advantage, loss, reducer. Pure; a method is a preset of these five."""
