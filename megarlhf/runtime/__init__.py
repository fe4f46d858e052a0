"""What every command that builds models shares, whether it trains them or only reads them: settings, checks, tables."""
