"""The mixture-of-experts layer: router, balance, dispatch, experts."""
