def picture() -> str:
    return ""
