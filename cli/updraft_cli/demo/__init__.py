"""`updraft demo`: the whole loop on this machine under real prompts, measured against what it has to beat, and a report.

plan says what happens when; traffic sends live requests; probe measures at report points; watch follows the processes;
all of it goes into one recording, which report turns into numbers and page and charts into something to look at.
"""
