"""The wordings from which training prompts are put together.

An adapter generalizes to the wordings of its users only when it was trained on many, so every list here is meant to be
long and uneven. None of them may use the wordings of `lkq_hf.evaluation.tasks`: evaluation measures wordings that
were not trained on.
"""


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a careful reader. Answer from the given text only.",
    "You answer questions about documents.",
    "Be brief and exact.",
    "You are an expert technical writer.",
    "You are a librarian who finds things in long texts.",
    "Answer truthfully. If the text does not say, say so.",
    "You help people understand documentation.",
    "You are a research assistant. Quote your sources when you can.",
    "Reply in plain English, without introductions.",
    "You are a patient teacher who explains things step by step.",
    "You are a customer support agent with access to the manual below.",
    "Follow the user's instructions exactly.",
    "You are an assistant that reads long documents and remembers every detail.",
    "Think about what was asked and give only that.",
    "You write clear summaries for busy people.",
    "You are a search engine that answers in sentences.",
    "Your answers are short, correct and complete.",
    "You are an editor.",
    "You are a helpful, honest and harmless AI model.",
    "Today you help a student who reads a difficult text.",
    "Use the document provided by the user as your only source of knowledge.",
)

# How the text and the task are put into one message. The first list has the task at the end, the second at the start.
TASK_LAST = (
    "{document}\n\n{task}",
    "{document}\n\n---\n\n{task}",
    "{document}\n\nQuestion: {task}",
    "{document}\n\nQ: {task}\nA:",
    "Text:\n{document}\n\nTask: {task}",
    "Text: {document}\n\nQuestion: {task}\n\nAnswer:",
    "Context:\n{document}\n\n{task}",
    "Read this:\n\n{document}\n\n{task}",
    "Read the following text carefully.\n\n{document}\n\nNow: {task}",
    "<document>\n{document}\n</document>\n\n{task}",
    "<text>{document}</text>\n{task}",
    "```\n{document}\n```\n{task}",
    "### Document\n{document}\n\n### Task\n{task}",
    "Here is a part of a manual:\n\n{document}\n\nMy question: {task}",
    "I have copied some pages below.\n\n{document}\n\nThat was the text. {task}",
    'The text is: "{document}"\n\n{task}',
    "=== BEGIN ===\n{document}\n=== END ===\n\n{task}",
    "Use the passage to answer.\n\nPassage: {document}\n\n{task}",
    "I am going to give you a document and then ask you something about it.\n\n{document}\n\n{task}",
    "Below you find notes that I took.\n\n{document}\n\nWith these notes in mind: {task}",
)
TASK_FIRST = (
    "{task}\n\n{document}",
    "{task}\n\nText:\n{document}",
    "{task} Use the text below.\n\n{document}",
    "Question: {task}\n\nContext: {document}",
    "I will give you a text. {task}\n\n<text>\n{document}\n</text>",
    "Task: {task}\n\nDocument:\n\n{document}\n\nAnswer:",
    "While you read, keep this in mind: {task}\n\n{document}",
    "{task}\n---\n{document}\n---",
)
TASK_TWICE = (
    "{task}\n\n{document}\n\nAgain: {task}",
    "Question: {task}\n\nText:\n{document}\n\nQuestion: {task}",
    "You will be asked this: {task}\n\n{document}\n\nSo: {task}",
)

# A text without a task, and what the assistant says to it. Questions follow.
READ_FIRST = (
    "{document}",
    "{document}\n\nI will ask you about this text.",
    "{document}\n\n---\n\nThat was all. My questions come next.",
    "Read this first:\n\n{document}",
    "Read the following text carefully. I have several questions about it.\n\n{document}",
    "<document>\n{document}\n</document>\n\nTell me when you have read it.",
    "Here is what we will talk about:\n\n{document}",
    "Please keep the following in mind.\n\n{document}",
    "Text:\n{document}\n\nWait for my questions.",
    "I am working with this manual:\n\n{document}\n\nLet us go through it together.",
)
READY = (
    "I have read the text. What would you like to know?",
    "Understood. Ask me anything about it.",
    "Done. What is your question?",
    "I am ready for your questions.",
    "Thank you. How can I help you with this text?",
    "OK.",
)

STYLES = (
    *("",) * 14,
    " Answer in one sentence.",
    " Answer in a few words.",
    " Be brief.",
    " Use at most three sentences.",
    " Use simple words.",
    " Answer in a short paragraph.",
    " Say it in your own words.",
    " Give details.",
    " Please be precise.",
    " Do not use outside knowledge.",
    " Answer from the text.",
    " Write for a beginner.",
    " Format the answer as a list.",
)

MONTHS = _listed("January, February, March, April, May, June, July, August, September, October, November, December")

# --- Planted facts: somebody or something (owner) has some property (attribute) with a value. ---
PERSONS = _listed(
    "Amelia Hart, Boris Lindqvist, Chiara Moretti, Daniel Okafor, Elif Yilmaz, Farid Haddad, Greta Olsen, Hiro "
    "Tanaka, Ines Carvalho, Jonas Weber, Kavita Rao, Liam Byrne, Mei Chen, Nadia Petrova, Oscar Nilsson, Priya "
    "Nair, Quentin Dubois, Rosa Alvarez, Samuel Adeyemi, Tara Singh, Umar Farooq, Vera Novak, Wanda Kowalska, "
    "Xavier Roche, Yusuf Demir, Zoe Papadakis, Professor Albright, Doctor Kimura, Captain Reyes, Mrs. Whitlock, "
    "Mr. Osei, Aunt Judith"
)
PLACES = _listed(
    "Lisbon, Nairobi, Osaka, Bergen, Quito, Tallinn, Adelaide, Casablanca, Winnipeg, Kraków, Valparaíso, Izmir, "
    "Galway, Hanoi, Tampere, Leipzig, Porto Alegre, Dunedin, Salzburg, Antwerp, the harbour of Split, the village "
    "of Elmsford, the Kessler building, the north tower, the island of Ven, the Maple Street office, the old "
    "mill, the Vega station"
)
PROJECTS = _listed(
    "project Bluebird, project Granite, the Orion programme, operation Sandstone, the Helios team, the Juniper "
    "release, the Falcon contract, the Meridian account, the Aurora experiment, the Cobalt initiative, the "
    "Tidewater fund, team Heron, the Redwood migration, the Lantern prototype, the Marble archive, the Sycamore "
    "study"
)
OBJECTS = _listed(
    "the green locker, the brass key, the silver laptop, the cargo container, the blue bicycle, the third safe, "
    "the spare router, the museum painting, the red notebook, the telescope, the wine crate, the backup drive, "
    "the grand piano, the delivery van, the coffee machine, the steel cabinet, the weather balloon, the archive "
    "box, the printer on the second floor, the ferry Aldora, locomotive Perseus, the yacht Miranda, the satellite "
    "Kestrel"
)
NUMBER_ATTRIBUTES = _listed(
    "access code, ticket number, serial number, PIN, extension, invoice number, badge number, account number, "
    "registration number, reference number, entry code, case number, customer id, locker combination, order "
    "number, phone extension, inventory number, tracking number, identification number, score, weight in grams, "
    "annual budget in euros, visitor count, membership number, file number, passcode, port number, batch number"
)
WORD_ATTRIBUTES = _listed(
    "password, favourite colour, code word, nickname, secret ingredient, favourite fruit, call sign, mascot, "
    "emergency word, chosen symbol, house pet, label, keyword, lucky charm, preferred tea"
)
DATE_ATTRIBUTES = _listed(
    "deadline, date of birth, founding date, inspection date, expiry date, departure date, date of the next "
    "meeting, delivery date, start date, anniversary"
)
NAME_ATTRIBUTES = _listed("contact person, inventor, guardian, owner, director, deputy, auditor, best friend")

WORDS = _listed(
    "apricot, walrus, indigo, thimble, saffron, lantern, pelican, quartz, marigold, anchor, cinnamon, badger, "
    "turquoise, velvet, compass, nutmeg, heron, crimson, pebble, juniper, magnolia, otter, copper, mango, "
    "zeppelin, harpoon, olive, raven, tulip, amber, walnut, falcon, ginger, orchid, beacon, papaya, lobster, "
    "maple, violet, hammock"
)

# Names that say nothing, of two parts, as machines and branches have them.
CODE_NAMES = tuple(f"{first}-{second}" for first, second in zip(WORDS, WORDS[7:] + WORDS[:7], strict=True))
OWNERS = (PERSONS, PLACES, PROJECTS, OBJECTS, CODE_NAMES)

STATEMENTS = (
    "The {attribute} of {owner} is {value}.",
    "{Owner}'s {attribute} is {value}.",
    "{value} is the {attribute} of {owner}.",
    "The {attribute} for {owner} was set to {value}.",
    "For {owner}, the {attribute} is now {value}.",
    "Remember that {owner} has {value} as {attribute}.",
    "Note ({owner}): {attribute} {value}.",
    "{Owner} - {attribute}: {value}.",
    "According to the records, the {attribute} of {owner} equals {value}.",
    "If anybody asks for the {attribute} of {owner}, say {value}.",
    "Last week {owner} was given the {attribute} {value}.",
    '"{value}," she whispered, "that is the {attribute} of {owner}."',
    "It turned out that the {attribute} belonging to {owner} had been {value} all along.",
    "By the way, we wrote down {value} as the {attribute} of {owner}.",
    "Nobody knew the {attribute} of {owner} until a letter gave it as {value}.",
    "[{attribute} | {owner} | {value}]",
    "Please use {value} whenever the {attribute} of {owner} is needed.",
    "Among other things, {owner} has the {attribute} {value}.",
    "Internal memo: {owner}, {attribute} = {value}.",
    "The clerk typed {value} into the field for the {attribute} of {owner}.",
    "Its {attribute} being {value}, {owner} could be told apart from the others.",
    "You may forget everything else, but the {attribute} of {owner} is {value}.",
    "There is one more thing: the {attribute} of {owner}. It is {value}.",
    "{Owner} ({attribute} {value}) was mentioned in the report.",
)
FACT_QUESTIONS = (
    "What is the {attribute} of {owner}?",
    "What is {owner}'s {attribute}?",
    "Which {attribute} does {owner} have?",
    "Find the {attribute} of {owner}.",
    "Tell me the {attribute} that belongs to {owner}.",
    "{Owner} has which {attribute}?",
    "Look up the {attribute} of {owner} and reply with it alone.",
    "I need the {attribute} of {owner}. What is it?",
    "State the {attribute} of {owner}.",
    "Do you know the {attribute} of {owner}? It is written in the text.",
    "Somewhere in the text the {attribute} of {owner} is given. Write it down.",
    "Please give me {owner}'s {attribute}.",
    "What does the text give as the {attribute} of {owner}?",
    "Fill in the blank: the {attribute} of {owner} is ____.",
    "Only output the {attribute} of {owner}, nothing else.",
    "What was recorded as the {attribute} for {owner}?",
    "In the passage above, a {attribute} is named for {owner}. Repeat it.",
    "Search for {owner}. What {attribute} is stated there?",
)
FACT_ANSWER_STARTS = (
    "The {attribute} of {owner} is",
    "{Owner}'s {attribute} is",
    "It is",
    "The answer is",
    "According to the text, the {attribute} of {owner} is",
    "Sure! The {attribute} of {owner} is",
    "{Owner}:",
    "Answer:",
    "The text says that the {attribute} of {owner} is",
)
ALL_FACTS_QUESTIONS = (
    "List the following as given in the text: {requests}.",
    "Give me each of these: {requests}.",
    "I am looking for several things: {requests}. Write one per line.",
    "Find all of them: {requests}.",
    "Write a table with {requests}.",
    "What are {requests}?",
)

# --- Questions made from the text itself. ---
QUESTIONS = (
    "What does the text say about {term}?",
    "What do we learn about {term}?",
    "Which facts about {term} are given?",
    "How is {term} described?",
    "Why does {term} matter here?",
    "What is said about {term}, and where does it come up?",
    "Tell me everything in the text that concerns {term}.",
    "In what connection is {term} mentioned?",
    "According to the text, what should one know about {term}?",
    "What is the role of {term}?",
    "How does {term} work according to this?",
    "When would one use {term}?",
    "What happens with {term}?",
    "Is there anything to be careful about with {term}?",
)
QUESTION_STARTS = (
    "According to the text, {term}",
    "The text says that {term}",
    "{Term} is",
    "{Term}",
    "The text",
    "Here,",
)
EXPLAIN = (
    "Explain {term} as the text does.",
    "Explain what {term} means.",
    "Define {term} in the sense of this text.",
    "What is meant by {term}?",
    "Describe {term} to someone who has not read the text.",
    "Give a short definition of {term}.",
    "What is {term}?",
    "Help me understand {term}.",
    "Write a glossary entry for {term}.",
    "I do not understand {term}. Can you clarify it?",
)
EXPLAIN_STARTS = ("{Term} is", "{Term} refers to", "In this text, {term} means", "Here {term}", "**{Term}**:")
COMPARE = (
    "Compare {term} and {other}.",
    "What is the difference between {term} and {other}?",
    "How do {term} and {other} relate to each other?",
    "What do {term} and {other} have in common?",
    "Contrast {term} with {other}.",
    "When does the text speak of {term}, and when of {other}?",
)
COMPARE_STARTS = ("{Term} and {other}", "While {term}", "The difference is that", "Both {term} and {other}")
SUMMARISE = (
    "Summarise the text.",
    "Give a summary of the whole text in one paragraph.",
    "Summarize the main points as bullet points.",
    "What is this text about?",
    "Write an abstract of the text.",
    "TL;DR?",
    "Sum up the above in three sentences.",
    "List the five most important points.",
    "Write a title and a two-sentence summary.",
    "Tell me in brief what I would learn from reading this.",
    "Give the key ideas, one per line, each starting with a dash.",
    "Write a short outline of the text.",
    "What are the main arguments?",
    "Condense this into a few lines that I can send to a colleague.",
)
SUMMARISE_STARTS = (
    "The text",
    "The text is about",
    "-",
    "1.",
    "Summary:",
    "Here is a summary:\n\n",
    "In short,",
    "This",
)
SUMMARISE_PART = (
    'Summarise the paragraph that begins with "{beginning}".',
    'What is the point of the part that starts "{beginning}"?',
    'Put the passage beginning "{beginning}" into one sentence.',
)
SECTIONS = (
    "Which section mentions {term}?",
    "Under which heading is {term} discussed?",
    "Where in the text does {term} come up? Name the section.",
    "Find the part about {term} and tell me its heading.",
)
SECTION_STARTS = ("The section", "It is discussed in", "{Term} is mentioned in", "Under")
QUOTE = (
    'Quote the sentence that contains "{phrase}".',
    'Find the sentence with the words "{phrase}" and copy it.',
    'Write out the full sentence in which "{phrase}" appears.',
    'Which sentence has "{phrase}" in it?',
)
CLOZE = (
    'Complete this sentence from the text: "{half}"',
    'How does this sentence go on in the text? "{half} ..."',
    'The text has a sentence that begins "{half}". Finish it.',
    "Fill in the rest as in the text: {half} ___",
)
COPY = (
    'Repeat the paragraph that begins with "{beginning}", word for word.',
    'Copy the passage starting at "{beginning}".',
    'Give me the exact text from "{beginning}" on.',
    'What comes after "{beginning}"? Quote it.',
)
CONTINUE = (
    "Continue the text.",
    "Write the next paragraph.",
    "How might the text go on? Write a continuation in the same style.",
    "Go on from where the text stops.",
    "The text was cut off. Please complete it.",
    "Write the following section.",
)
DOCUMENT_HEADERS = (
    "Document {number}:\n{text}",
    "[{number}] {text}",
    "Document [{number}]\n{text}",
    "## Source {number}\n{text}",
    '<doc id="{number}">\n{text}\n</doc>',
    "Passage {number}. {text}",
)
DOCUMENT_QUESTIONS = (
    "According to document {number}, what about {term}?",
    "Which of the documents speaks about {term}, and what does it say?",
    "What does source {number} say about {term}?",
    "Answer from passage {number}: what is {term}?",
    "Summarise number {number}.",
    "Give the number of the document that mentions {term}.",
    "Using the documents, explain {term}.",
)
