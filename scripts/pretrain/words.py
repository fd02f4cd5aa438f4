"""The words of the embedded model: each is one token, read and answered in pre-training."""

from __future__ import annotations

from collections.abc import Sequence

from fedmllm.data.scenes import COLOURS, KINDS, PLACES


def unique(*groups: Sequence[str]) -> tuple[str, ...]:
    """All words of the groups once, in order of first appearance."""
    return tuple(dict.fromkeys(word for group in groups for word in group))


def listed(text: str) -> tuple[str, ...]:
    """The words of a text, each once."""
    return unique(text.split())


PLURALS = {
    **{kind: f"{kind}s" for kind in KINDS},
    "cross": "crosses",
}
# The class names of CrisisMMD and Hateful Memes, as shared/protocol.md prints them.
CRISIS_CLASSES = (
    "affected_individuals",
    "infrastructure_and_utility_damage",
    "injured_or_dead_people",
    "missing_or_found_people",
    "rescue_volunteering_or_donation_effort",
    "vehicle_damage",
    "other_relevant_information",
    "not_humanitarian",
)
MEME_CLASSES = ("not-hateful", "hateful", "benign")
NUMBERS = tuple("0123456789")
MEDICAL = listed(
    """heart lung lungs liver kidney kidneys brain stomach bone bones spleen bladder skull chest
    abdomen neck head pelvis spine rib ribs artery lesion tumor mass fluid fracture scan organ
    organs normal abnormal left right upper lower middle front back disease drug vein nerve muscle
    cyst blood pain cough fever infection cancer heartbeat swelling tissue skin eye ear hand foot
    cell doctor patient image picture x-ray mri ct pneumonia effusion edema nodule bleeding stroke
    dose treat treats treatment cause causes symptom symptoms vessel colon intestine pancreas
    gland thyroid joint knee hip shoulder tooth tongue throat nose mouth finger arm leg"""
)
CRISIS = listed(
    """fire flood storm damage damaged destroyed people injured dead killed missing found rescue
    rescued help donate donation donations volunteer volunteers water food shelter road bridge
    truck hurt lost safe news weather prayer pray prayers hurricane earthquake wildfire city town
    street building buildings roof wall power lines hospital family families child children
    victims survivors team teams crews army boat plane relief supplies money blankets clothes
    evacuated homeless trapped smoke burned broken collapsed crash crashed vehicle vehicles update
    report reports warning alert morning today tonight tomorrow yesterday movie music game sale
    party sunny holiday coffee birthday"""
)
SOCIAL = listed(
    """love hate like welcome belong belongs leave stay here nobody everyone only friend friends
    enemy enemies good bad happy sad great awful nice ugly beautiful terrible kind cruel best worst
    fun boring angry proud funny stupid clever rude gentle fear hope joy peace war trust lie true
    false right wrong better worse never always group neighbor neighbors men women they them us
    join ban keep out away go come home world nice thanks sorry please"""
)
THINGS = listed(
    """dog cat bird fish horse cow apple bread cake milk egg rice tea book pen chair table door
    window lamp bed box cup key ball toy shoe hat shirt ring coin clock phone paper letter river
    hill sea lake beach forest flower grass leaf rain snow wind sun sky night day week month year
    king queen baby girl boy man woman teacher school shop garden farm train bus bike ship drum
    song story color colour square alpha beta gamma delta omega north south east west one two three
    four five six seven eight nine ten zero hot cold big small old new fast slow long
    short"""
)
QUESTION = listed(
    """what which where how many is are does do the a an of in on at to it this that there not no
    nothing none yes and or if then else say answer image picture scene shape shapes thing things
    color colour named name names text word words first last contain contains show shows shown
    present see seen look only same different than more less any all some both named mean means
    called what's option options best based with without considering modality letter from for by
    category content humanitarian select question before after between near next please describe
    repeat count holds hold called also ones one its as"""
)
FUNCTION = listed(
    """i you he she we my your his her our their me him was were be been being has have had will
    would can could should may might must did done just now still very too so but because while
    when who whom whose why these those into over under up down off again once each every few
    most other another such own than about against during through until since ago soon later early
    get got make made take took give gave put let tell told think know want need feel try use work
    call ask seem become keep begin turn start run move live believe bring happen write sit stand
    lose pay meet learn change lead follow stop watch set even much really maybe almost already
    perhaps together alone around behind above below inside outside far close against don't can't
    isn't not"""
)
CAPITALS = listed(
    """User Assistant Select Text Question Options Answer What Which Where How Is Are Does Do The A
    An If It There This That In On At Say No Yes Here We They I You He She My Our Only Everyone
    Nobody Please Look Describe Repeat Count Can Name Who Why When"""
)

PLACE_WORDS = unique(*(tuple(place.split()) for place in PLACES))
LABELS = (*CRISIS_CLASSES, *MEME_CLASSES)
# Words that questions on texts are about: any of them may be an answer.
CONTENT = unique(KINDS, tuple(COLOURS), MEDICAL, CRISIS, SOCIAL, THINGS, LABELS)
WORDS = unique(
    CONTENT,
    PLACE_WORDS,
    tuple(PLURALS.values()),
    PLACE_WORDS,
    NUMBERS,
    QUESTION,
    FUNCTION,
)
