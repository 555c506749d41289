"""The words of the made-up messages: what customers of a company ask its support desk for, in many wordings.

Data only; `messages.py` composes it.  `[a|b]` means one of a and b, `{slot}` is filled in.  The slots `{person}`,
`{account}`, `{order}` and `{sum}` hold secrets; `{item}`, `{days}`, `{company}`, `{wish}` and `{topic}` do not.

What makes the task a task: every intent's words also occur in messages of other intents (`DISTRACTIONS`), so that
counting words does not decide, and a few messages (`BETWEEN_TWO`) could be either of two intents for a person as well.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Intent:
    """What a message is about.

    Parameters
    ----------
    name : str
        The label name.
    share : float
        How often it occurs, as a weight.
    asks : tuple of str
        Whole sentences that say it.
    wishes : tuple of str
        It as a verb phrase: what goes after "I want to".
    topics : tuple of str
        It as a noun phrase: what goes after "it is about".
    """

    name: str
    share: float
    asks: tuple[str, ...]
    wishes: tuple[str, ...]
    topics: tuple[str, ...]


INTENTS = (
    Intent(
        name="address_change",
        share=0.08,
        asks=(
            "[we have|I have|my family has] moved, please [note|save|use] the new address [from now on|from next week]",
            "[parcels|letters] still go to my old [flat|house|office], [can|could] you correct that",
            "the street in my [profile|account|records] is [wrong|out of date]",
            "how do I [enter|set] a different [postcode|street|delivery address]",
            "[please|kindly] send everything to my [new home|new office|parents' house] [in future|from today]",
            "my [house number|postcode] is [misspelt|wrong] on {account}",
            "I [live|work] somewhere else now and you [need|should have] the new details",
        ),
        wishes=("change my address", "have my new address saved", "update where you deliver to", "correct my postcode"),
        topics=(
            "my new address",
            "a move to another flat",
            "the address you have for me",
            "changing the delivery address",
        ),
    ),
    Intent(
        name="cancel_order",
        share=0.09,
        asks=(
            "please stop {order} [before it ships|before it is packed|right away]",
            "I [ordered|clicked on] the {item} by mistake, do not send it",
            "I [changed my mind|do not need it any more], take {order} out of the queue",
            "is it too late to call off [the order|{order}|what I ordered this morning]",
            "[I bought|we bought] the {item} twice, keep one and drop the other",
            "the {item} [is|was] cheaper elsewhere, so please [do not ship mine|withdraw my purchase]",
            "{order} [should not|must not] go out, nobody here needs it any more",
        ),
        wishes=("cancel my order", "call off an order", "stop an order before it ships", "take back what I ordered"),
        topics=("cancelling an order", "an order that should not ship", "a purchase I do not want any more"),
    ),
    Intent(
        name="close_account",
        share=0.06,
        asks=(
            "please [delete|remove|erase] {account} and [everything|all data] in it",
            "I am [leaving|done with] {company}, [shut|close] my profile for good",
            "I [do not|will not] use your shop any more, take me out of your [system|customer list]",
            "how can I [end|terminate] my membership [completely|for good]",
            "my [father|mother|business] no longer needs {account}, it can go",
            "[unsubscribing|switching everything off] is not enough, I do not want to be a customer any more",
        ),
        wishes=("close my account", "delete my profile", "leave you as a customer", "have all my data erased"),
        topics=("closing my account", "deleting my profile", "the end of my membership"),
    ),
    Intent(
        name="damaged_goods",
        share=0.1,
        asks=(
            "the {item} [arrived|came|reached us] [broken|in pieces|with a deep scratch]",
            "[one corner|the lid|the handle|a leg] of the {item} is [cracked|bent|snapped off]",
            "I opened the box and the {item} was [smashed|leaking|dented]",
            "the {item} [does not switch on|stopped after an hour|rattles], it must have been dropped",
            "[half of the parts|two screws|the cable] of the {item} [were|was] missing or torn",
            "the parcel looked [crushed|wet] and so does the {item} inside",
            "what you sent in {order} is [faulty|defective]",
        ),
        wishes=("report a broken {item}", "show you what is damaged", "have a faulty {item} looked at"),
        topics=("a damaged {item}", "a broken delivery", "a faulty {item}", "the crack in my {item}"),
    ),
    Intent(
        name="delivery_late",
        share=0.14,
        asks=(
            "{order} [was due|was promised] {days} ago and [nothing is here|has not turned up]",
            "where [is|on earth is] [my parcel|my {item}|{order}]",
            "I am still waiting for the {item}, [how much longer|when does it come]",
            "the tracking page has not [moved|changed] for {days}",
            "your driver [never came|did not ring], and I [took a day off|stayed at home] for it",
            "[everyone|my neighbour] has got theirs, only my {item} [is missing|is on its way forever]",
            "you [said|wrote] it ships in a day, that was {days} ago",
            "[has|did] {order} [left|leave] your warehouse at all",
        ),
        wishes=("know where my parcel is", "find out when the {item} comes", "track {order}"),
        topics=("a late parcel", "a delivery that has not come", "the wait for my {item}", "where {order} is"),
    ),
    Intent(
        name="invoice_copy",
        share=0.08,
        asks=(
            "[could|can] you [mail|send|forward] me [the bill|the receipt|an invoice] for {order} [again|as a pdf]",
            "[my tax adviser|our bookkeeping|the auditor] needs [paper|proof] for the {sum} I spent with you",
            "I [lost|deleted|cannot find] the receipt for the {item}",
            "there was no [bill|invoice|receipt] in the [box|parcel|email]",
            "please [write|issue] the bill to [my company|our firm] and send it [once more|by email]",
            "where do I [download|print] what I was billed in [March|May|October|December]",
        ),
        wishes=("have a copy of the invoice", "get the receipt again", "download an old bill"),
        topics=("a copy of an invoice", "a lost receipt", "the bill for {order}", "paperwork for my taxes"),
    ),
    Intent(
        name="opening_hours",
        share=0.05,
        asks=(
            "are you [open|there|reachable] on [Saturday|Sunday|Easter Monday|the holiday]",
            "[until when|from when] can I [reach|call|visit] [you|the shop|your hotline] [today|on Friday|this week]",
            "when does [the shop|your counter|the showroom] [open|close|shut]",
            "I [stood|was] in front of a locked door, when is somebody there",
            "[does|is] the hotline [answer|manned] [at night|at the weekend|before eight]",
            "what time can I [come by|drop in] to [collect|look at] the {item}",
        ),
        wishes=("know when you are open", "visit the shop on a Saturday", "reach somebody at the weekend"),
        topics=("your opening hours", "when the shop is open", "the hours of the hotline"),
    ),
    Intent(
        name="password_reset",
        share=0.1,
        asks=(
            "I [cannot|can not] [log in|sign in|get into {account}] [any more|since this morning]",
            "I forgot [my password|the code word|my pin] [again|completely]",
            "the link for a new password [has expired|never arrives|leads nowhere]",
            "the page says my [details are|password is] wrong [three times in a row|every time]",
            "{account} is locked after [too many|three] attempts",
            "my [phone|computer] is new and the [site|app] does not [know|accept] me",
            "the text message with the code [does not come|comes too late]",
        ),
        wishes=("reset my password", "get back into my account", "set a new pin", "unlock my login"),
        topics=("a forgotten password", "a login that does not work", "a locked profile"),
    ),
    Intent(
        name="payment_failed",
        share=0.1,
        asks=(
            "[my card|the transfer|the direct debit] is [declined|refused|rejected] [at the last step|every time]",
            "I [tried|wanted] to pay {sum} and [got an error|the page froze]",
            "{order} shows as unpaid although [my bank|the app] says it [went through|was sent]",
            "the checkout does not [take|accept] my [card|voucher|bank]",
            "[you took|I was charged] {sum} twice for one {item}",
            "[why|how come] does the [payment|amount of {sum}] not go through, there is enough on my [card|account]",
            "it [hangs|stops] when I [type in|confirm] the card number",
        ),
        wishes=("pay for {order}", "get a payment through", "use my card at the checkout"),
        topics=("a payment that fails", "a declined card", "the {sum} that does not go through", "a double charge"),
    ),
    Intent(
        name="plan_upgrade",
        share=0.07,
        asks=(
            "[we are growing|our team has doubled], which [bigger|larger] [package|plan|tier] is there",
            "what [does|would] the [premium|next higher|business] [package|plan|tier] cost [a month|us]",
            "[put|switch|move] {account} to the [premium|business|yearly] [tier|plan] please",
            "I need more [seats|storage|users] than my [plan|contract] has",
            "can I [go from basic to premium|take the larger package] [in the middle of the month|today]",
            "does the [yearly|premium|family] plan [include|come with] [support|free shipping]",
        ),
        wishes=("upgrade my plan", "switch to the premium package", "get more seats", "go to a higher tier"),
        topics=("an upgrade to premium", "the bigger package", "a higher plan for {account}"),
    ),
    Intent(
        name="refund",
        share=0.13,
        asks=(
            "I sent the {item} back {days} ago and [the money|the {sum}] is not [on my card|with me] yet",
            "when do I [get|see] [my money|my {sum}|what I paid] again",
            "please [pay|transfer] {sum} back to [me|my card|my bank account]",
            "you [owe|still owe] me {sum} for {order}",
            "a [voucher|credit note] does not help me, I want [cash|the amount] returned",
            "the return of {order} was confirmed but [no money|nothing] [came|arrived]",
            "you [gave|returned] only half of the {sum}, what about the rest",
        ),
        wishes=("get my money back", "be refunded for {order}", "have {sum} returned to my card"),
        topics=("a refund", "the money for a returned {item}", "the {sum} you owe me"),
    ),
    Intent(
        name="staff_complaint",
        share=0.06,
        asks=(
            "[your colleague|the man|the woman] at the [counter|hotline|shop] was [rude|unfriendly|impatient] with me",
            "I was [shouted at|laughed at|hung up on] by [your driver|an agent|someone of your team]",
            "nobody should [talk|speak] to customers [like that|the way your driver did]",
            "[the agent|your technician] [rolled his eyes|made fun of me] when I asked about the {item}",
            "I [expect|want] an apology [from the manager|for how I was treated]",
            "I [waited {days}|called five times] and every agent [was bored|sent me away]",
        ),
        wishes=("complain about an employee", "speak to the manager of a rude agent", "report how I was treated"),
        topics=("a rude agent", "the tone of your driver", "how your team treated me"),
    ),
)

# An intent said in general words: any of its wishes or topics fits, and so do those of every other intent.
GENERAL_ASKS = (
    "I [want|need|would like|have] to {wish}",
    "[can|could] you help me [to|] {wish}",
    "what do I have to do to {wish}",
    "[I am writing|this is|my question is] about {topic}",
    "[it is about|I have a problem with|please look into] {topic}",
    "who [takes care of|is in charge of] {topic}, that is what I need [today|now]",
)

# Another intent's wish or topic in a message that is not about it.
DISTRACTIONS_BEFORE = (
    "this is not about {topic}",
    "thank you for your help with {topic}, [that is solved|all fine now]",
    "[last month|last week|in spring] I wanted to {wish}, [that worked|that is done]",
    "I do not want to {wish}",
    "your robot thinks I want to {wish}, [wrong|no]",
    "my [colleague|wife|neighbour] wrote to you about {topic}, I have another [matter|question]",
)
DISTRACTIONS_AFTER = (
    "the page about {topic} did not help",
    "please do not answer with the text on {topic}",
    "[no need|I do not want] to {wish}",
    "{topic} can wait",
    "{topic} was [settled|sorted out] [long ago|last week]",
    "I know how to {wish}, that is not it",
)

# (one intent, another, sentence): a desk would file these under either.
BETWEEN_TWO = (
    ("cancel_order", "refund", "I do not want {order} any more, [give|send] me my {sum} back"),
    ("cancel_order", "delivery_late", "{order} is {days} late, [forget it|then I do not need it]"),
    ("damaged_goods", "refund", "the {item} [came|arrived] broken and I want my {sum} back"),
    ("delivery_late", "refund", "the {item} never came, so [return|pay back] my {sum}"),
    ("close_account", "staff_complaint", "after the way your agent spoke to me you can delete {account}"),
    ("password_reset", "payment_failed", "I cannot pay {sum} because {account} does not let me in"),
    ("address_change", "delivery_late", "{order} is not here, did it go to my old address"),
    ("invoice_copy", "payment_failed", "I paid {sum} but there is no bill and {order} shows as open"),
    ("plan_upgrade", "payment_failed", "the premium plan is booked but my card was declined for it"),
)

GREETINGS = (
    "hello",
    "hi",
    "dear team",
    "good morning",
    "dear {company} team",
    "hi {company}",
    "good evening",
    "hey there",
)
SIGNATURES = ("{person}", "thanks, {person}", "best regards, {person}", "yours, {person}", "regards {person}")
CLOSINGS = (
    "thanks",
    "thank you",
    "please hurry",
    "please answer soon",
    "thanks in advance",
    "it is urgent",
    "kind regards",
)
DETAILS = (
    "my account is {account}",
    "{account}",
    "order number {order}",
    "it was {sum} in all",
    "I am {person}, {account}",
    "see {order}",
    "my name is {person}",
    "I have been with {company} for years",
)
ITEMS = (
    *(
        "lamp",
        "kettle",
        "desk",
        "office chair",
        "backpack",
        "phone case",
        "blender",
        "bicycle helmet",
        "tent",
        "mirror",
    ),
    *("printer", "coffee machine", "keyboard", "bookshelf", "suitcase", "drill", "monitor", "vase", "toaster", "scarf"),
    *("headset", "mattress", "garden table", "water filter", "camera", "rain jacket", "clock", "speaker", "heater"),
)
DAYS = ("three days", "five days", "a week", "ten days", "two weeks", "almost a month", "a month", "six weeks")

# Syllables that join to names nobody bears.
FIRST_SYLLABLES = (
    ("Bri", "Cal", "Dov", "Elv", "Fen", "Gri", "Jor", "Kel", "Lum", "Nev", "Orr", "Pax", "Quil", "Ulv", "Vex", "Zel"),
    ("dax", "nox", "vith", "lomi", "mirn", "quat", "tisk", "veno", "zoth", "ryx"),
)
LAST_SYLLABLES = (
    ("Ash", "Brack", "Corv", "Drel", "Fosk", "Grum", "Hask", "Kelb", "Mord", "Nask", "Pelth", "Quor", "Strev", "Trask"),
    ("em", "io", "ul", "ari", "on", "efi"),
    ("quist", "vold", "nipp", "dorp", "thwick", "zand", "mosk", "plin"),
)
COMPANY_SYLLABLES = (
    ("Brav", "Cind", "Drov", "Elst", "Fenn", "Hulm", "Korv", "Lask", "Mirr", "Novv", "Pald", "Sterv", "Tolv", "Wend"),
    ("enor", "alux", "iqua", "omart", "ura", "evia", "izon", "ario"),
)
