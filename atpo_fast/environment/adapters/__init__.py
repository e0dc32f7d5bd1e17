"""Sessions over the environments of other projects, one file for each protocol (docs/environment_protocols.md).

Every file has a class, which wraps an environment object that you made, and most have an `open_session` for
`environment.factory`, which makes the object from the columns of a question's record. The packages are imported
where they are used: none of them is needed to import a file of this folder.
"""
