"""The command line: one file a command, none imported by `import fastlora`."""
