"""Learning from served traffic: a draft that is distilled between the requests it helps to answer."""
