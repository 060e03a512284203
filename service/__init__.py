"""What every process of Forebay needs: settings, logs, exit codes, an orderly life and end."""
