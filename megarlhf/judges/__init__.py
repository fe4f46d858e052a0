"""What a response is worth, said by something other than the policy."""
